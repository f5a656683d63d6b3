"""What a server or an engine takes and gives: load, memory, many clients, drafts, metrics."""
