"""A server: one base model in memory, any number of adapters in the same batch, OpenAI's HTTP API, jobs, a web page.

`settings` defines the settings, `server` holds what is served, `app` assembles the routes: `text` (completions and
chats), `adapters` (models and adapters), `tuning` (files and jobs), `page`.  Clients change the queue of `jobs`, whose
rows and events are `records`; `planner` makes the settings of their runs, and `supervisor` has the processes.
"""
