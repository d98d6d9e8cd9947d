"""2-D convolution: operators, operands, dispatch to one of several forms, tables of tuned choices."""
