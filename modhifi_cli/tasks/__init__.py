"""What the tool does, as generators of records: they write no file and print nothing."""
