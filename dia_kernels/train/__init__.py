"""Training of the networks: images, the papers' recipes, and a Lightning trainer that resumes to the bit."""
