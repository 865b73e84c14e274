"""Tables for READMEs and docs, made from the results files."""
