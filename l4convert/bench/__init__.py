"""How fast an artifact is and what memory it takes, by length of context; and plots of that."""
