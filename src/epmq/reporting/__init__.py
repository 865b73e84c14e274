"""What a run did: numbers, pages, pictures, tables in the terminal."""
