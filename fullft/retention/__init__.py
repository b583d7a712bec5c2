"""What the base model could do and what it is to learn, measured on the same items before, during and after."""
