"""The gate of one pytest session: options, collection, planning, fixtures and reports."""
