"""What a run costs: time and memory, beside other tools, by shape and by size."""
