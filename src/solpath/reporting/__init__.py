"""A family of models as files and pictures: the demo, its data, its charts and its page."""
