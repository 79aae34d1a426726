"""What a server or a request may say, resolved once into one frozen object."""
