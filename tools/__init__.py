"""Programs around the package: data, benchmarks, tables."""
