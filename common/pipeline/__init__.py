"""The stages in order, the folder of a run, and the export of what came out."""
