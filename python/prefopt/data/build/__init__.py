"""From published sets to the rows of a recipe: download or read, convert, choose, write with a manifest."""
