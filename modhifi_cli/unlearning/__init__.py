"""ModHiFi-U: how a classifier forgets classes, one file for each method, and the search for its strength."""
