"""Tables of experiments: YAML in configs/tables/, one runner, one file of results (results/results.csv)."""
