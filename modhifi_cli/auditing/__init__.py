"""What an edit that shall make a classifier forget has left readable inside: attacks, figures and the verdict."""
