"""A server: one base model in memory, any number of adapters in the same batch, OpenAI's HTTP API, jobs, a page.

`settings` says what can be set, `server` holds what is served, `app` puts the routes together: `text` (completions and
chats), `adapters` (models and adapters), `tuning` (files and jobs), `page`.
"""
