"""What people see: progress, tables, messages."""
