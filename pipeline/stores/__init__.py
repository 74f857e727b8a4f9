"""The two kinds of storage behind ``pipeline.storage``: folders and object stores."""
