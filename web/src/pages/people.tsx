// Accounts: who may look, score, administer. A removed person's scores stay.
import { useSignal } from '@preact/signals'
import { useEffect } from 'preact/hooks'
import { api } from '../api'
import { attempt, readStudy, say, session } from '../state'
import type { Account, Role } from '../types'
import { Button, Dialog, Field, Spinner, when } from '../ui'

const roles: [Role, string][] = [['viewer', 'looks'], ['scorer', 'looks and scores'], ['admin', 'scores, adds people, changes the study']]

function RoleSelect({ value, onChange, label, short }: { value: Role; onChange: (r: Role) => void; label: string; short?: boolean }) {
  return (
    <select value={value} aria-label={label} onChange={(e) => onChange(e.currentTarget.value as Role)}>
      {roles.map(([r, what]) => <option key={r} value={r}>{short ? r : `${r}: ${what}`}</option>)}
    </select>
  )
}

function NewPerson({ onDone }: { onDone: () => void }) {
  const form = useSignal({ name: '', password: '', role: 'scorer' as Role })
  const put = (part: Partial<typeof form.value>) => { form.value = { ...form.value, ...part } }
  const add = async (e: Event) => {
    e.preventDefault()
    if (!await attempt(api.addPerson(form.value))) return
    say(`${form.value.name} can sign in now.`)
    form.value = { name: '', password: '', role: 'scorer' }
    onDone()
  }
  return (
    <form class="card row" onSubmit={add} aria-label="New person">
      <Field label="Name"><input required maxLength={80} autoComplete="off" value={form.value.name} onInput={(e) => put({ name: e.currentTarget.value })} /></Field>
      <Field label="First password"><input required type="password" minLength={8} autoComplete="new-password" value={form.value.password} onInput={(e) => put({ password: e.currentTarget.value })} /></Field>
      <Field label="Role"><RoleSelect label="Role" value={form.value.role} onChange={(role) => put({ role })} /></Field>
      <Button type="submit" look="main" icon="plus">Add the person</Button>
    </form>
  )
}

function NewPassword({ person, onClose }: { person: Account; onClose: () => void }) {
  const text = useSignal('')
  const save = async (e: Event) => {
    e.preventDefault()
    if (await attempt(api.changePerson(person.id, { password: text.value }))) { say(`${person.name} has a new password.`); onClose() }
  }
  return (
    <Dialog title={`New password for ${person.name}`} onClose={onClose}>
      <form class="stack" onSubmit={save}>
        <Field label="Password" note="At least eight characters."><input required type="password" minLength={8} autoComplete="new-password" value={text.value} onInput={(e) => { text.value = e.currentTarget.value }} /></Field>
        <Button type="submit" look="main">Save</Button>
      </form>
    </Dialog>
  )
}

export function People() {
  const all = useSignal<Account[] | null>(null)
  const changing = useSignal<Account | null>(null)
  const leaving = useSignal<Account | null>(null)
  const read = async () => { all.value = await attempt(api.people()) ?? all.value; void readStudy() }
  useEffect(() => { void read() }, [])
  const change = async (p: Account, body: Record<string, unknown>) => { if (await attempt(api.changePerson(p.id, body))) say('Saved.'); void read() }
  const remove = async (p: Account) => {
    try { await api.removePerson(p.id); say(`${p.name} is removed; the scores stay.`) } catch (e) { say((e as Error).message, true) }
    leaving.value = null
    void read()
  }
  return (
    <div class="page">
      <header class="page-head"><h1>People</h1></header>
      <NewPerson onDone={read} />
      <h2>Everyone</h2>
      {!all.value ? <Spinner /> : (
        <div class="table-frame"><table class="table">
          <thead><tr><th scope="col">Name</th><th scope="col">Role</th><th scope="col" class="wide-only">Since</th><th scope="col"><span class="hidden">Actions</span></th></tr></thead>
          <tbody>{all.value.map((p) => (
            <tr key={p.id} class={p.active ? '' : 'inactive'}>
              <th scope="row">{p.name}{p.id === session.value?.user?.id && <small> (you)</small>}{!p.active && <small> (cannot sign in)</small>}</th>
              <td><RoleSelect short label={`Role of ${p.name}`} value={p.role} onChange={(role) => void change(p, { role })} /></td>
              <td class="nowrap wide-only">{when(p.created_at)}</td>
              <td class="actions">
                <Button look="quiet" onClick={() => { changing.value = p }}>New password</Button>
                {p.id !== session.value?.user?.id && (p.active
                  ? <Button look="quiet" class="danger-text" onClick={() => { leaving.value = p }}>Remove</Button>
                  : <Button look="quiet" onClick={() => void change(p, { active: true })}>Let in again</Button>)}
              </td>
            </tr>
          ))}</tbody>
        </table></div>
      )}
      {changing.value && <NewPassword person={changing.value} onClose={() => { changing.value = null }} />}
      {leaving.value && (
        <Dialog title={`Remove ${leaving.value.name}?`} onClose={() => { leaving.value = null }}>
          <p>{leaving.value.name} can no longer sign in. Every score stays, under the same name.</p>
          <Button look="danger" onClick={() => void remove(leaving.value!)}>Remove</Button>
        </Dialog>
      )}
    </div>
  )
}
