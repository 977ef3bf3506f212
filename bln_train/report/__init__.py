"""Run folders, tables and plots; reads files, never live objects."""
