"""Generated clips that ask what a network can see, and the networks that are asked."""
