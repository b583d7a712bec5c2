"""What a run needs and costs, from the model's config alone: memory, communication, time, money."""
