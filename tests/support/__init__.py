"""What several rooms' tests share: small models, and references that know nothing of moec."""
