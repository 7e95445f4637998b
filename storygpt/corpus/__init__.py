"""Everything about data: sources, tokenizers, token files. Prepared datasets are made in subfolders, data/<name>/."""
