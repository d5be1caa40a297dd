"""One room per finding, called like its notebook."""
