"""Everything about data: sources, tokenizers, token files."""
