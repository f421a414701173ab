"""An HTTP server with the interface of OpenAI, for one model."""
