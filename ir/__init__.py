"""The intermediate representation: types, values, ops, graphs, and their text form."""
