"""Everything about machines, processes and files. Nothing here knows what a GPT is."""
