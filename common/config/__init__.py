"""The settings of an experiment: schema, presets, loading, reference."""
