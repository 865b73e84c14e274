"""What tests and benchmarks share: a folder that looks like the Hub, failing disks, damaged files, wrong merges."""
