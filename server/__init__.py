"""The coordinator: phases, collection, screening, aggregation, state and the report."""
