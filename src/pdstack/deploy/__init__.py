"""What the Ansible plugins call: versions, topology, validation, reports. No import of Ansible anywhere in here."""
