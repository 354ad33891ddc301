"""A detector small enough to run every stage in seconds."""
