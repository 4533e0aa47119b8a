"""What the report is made of: one file a section, each a function of the setting and of the sections before it."""
