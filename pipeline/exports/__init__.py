"""The forms that a view is written in for other loaders."""
