"""What becomes of runs that are killed, of disks that fail, of damaged files and of wrong merges."""
