"""The weight format, and the object store that carries published weights from the learner to the actors."""
