"""Tables and progress in the terminal. No torch here."""
