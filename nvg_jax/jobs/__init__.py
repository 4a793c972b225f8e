"""Long work of several processes on a `Pipeline`: sampling, encoding a data set, evaluation."""
