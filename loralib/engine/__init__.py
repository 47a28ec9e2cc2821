"""The one owner of a model's forward pass: what makes it faster or different, and what puts it in place."""
