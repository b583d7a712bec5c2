"""`fullft doctor`: what is wrong with the machines of a run, before it starts."""
