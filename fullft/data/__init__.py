"""From rows of a data set to the batches of a step."""
