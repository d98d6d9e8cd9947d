"""The Lightning side: network, data, training and the evaluation callback. Import from the modules themselves."""
