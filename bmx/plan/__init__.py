"""What fits, and how long it takes: sizes, counts and rates; touches no tensor."""
