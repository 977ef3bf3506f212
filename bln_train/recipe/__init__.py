"""What a recipe may say, and how it is read. No torch here."""
