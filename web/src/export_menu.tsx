import { Icon } from './ui'

/** The whole database as CSV; plain links, so that the browser saves the file itself. */
export function ExportMenu() {
  return (
    <span class="export" role="group" aria-label="Export">
      <a class="button" href="/api/export.csv?form=wide" download title="One row a picture: draft, each person, consensus"><Icon name="download" /><span>Wide CSV</span></a>
      <a class="button" href="/api/export.csv?form=long" download title="One row an event: who changed what, when"><Icon name="download" /><span>Long CSV</span></a>
    </span>
  )
}
