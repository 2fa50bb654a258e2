"""Files in, files out: rows, records, the journal, the manifest."""
