"""What a person starts: the spec file, the command line. Thin over the rooms below."""
