"""A page that answers all tasks of a model in the user's own browser, with no server and no network."""
