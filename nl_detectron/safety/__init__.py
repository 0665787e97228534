"""Reading files that may come from strangers, and writing only where the user said."""
