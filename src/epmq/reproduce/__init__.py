"""Published tables, run row by row beside the published figures."""
